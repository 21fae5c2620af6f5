"""The conformance suites: what every backend and every communicator must satisfy, importable from an installed hetero_attn.

    HETERO_ATTN_TEST_BACKENDS=mychip pytest --pyargs hetero_attn.testing

runs the attention suite on a backend of your own. The cases are data (`AttentionCase`), the checks are plain functions, so that
a failing case can be pasted into a Python prompt. Nothing here is imported by `import hetero_attn`.
"""
