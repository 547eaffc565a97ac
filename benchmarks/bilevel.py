"""The figures of bilevel learning: `python -m benchmarks bilevel`."""

from benchmarks import certificates, derivative_free, published, robust, smooth, timing, tuned

GROUPS = (
    certificates.GROUP,
    published.P1_GROUP,
    published.P3_GROUP,
    derivative_free.GROUP,
    robust.GROUP,
    timing.ORACLE_GROUP,
    tuned.GROUP,
    smooth.GROUP,
    timing.IMPORT_GROUP,
)
