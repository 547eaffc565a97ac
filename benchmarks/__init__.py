"""Side by side with peers: `python -m benchmarks NAME [--quick] [--json]`.

Every benchmark is one module that lists `GROUPS` of figures, each with its bar. Costs are counts of
lower-level gradients and Hessian products (or of function evaluations), never seconds, unless the
figure is about time itself. What the peers need (`DFO-LS`, scikit-learn, scikit-image) is in the
`bench` extra and is imported only where it is used.
"""
