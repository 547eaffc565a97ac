"""The figures of bilevel learning: `python -m benchmarks bilevel`."""

from benchmarks import certificates, smooth, timing

GROUPS = (
    certificates.GROUP,
    smooth.GROUP,
    timing.IMPORT_GROUP,
)
