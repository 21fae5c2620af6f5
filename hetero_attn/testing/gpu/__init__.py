"""What to run on a machine with a GPU: python -m hetero_attn.testing.gpu, or make gpu-check. No install is needed (PYTHONPATH=.:backends).

`checks` is the list of what is run, `children`, `apart` and `inside` how in processes of their own, `conform` the attention suite in one,
`groups` the ranks, `group_suite` the collectives suite on them, `graphs` and `group_graphs` what is captured (by `graph_seam`), `clock`
and `ceilings` how the device is timed and what it can do at most, `attention_bench` and `norm_bench` the figures against their bars,
`cooperation` KV on the device against KV in host memory, `page` what is written to docs/measured. Backends are found by name: one that
is absent is a line that says so.
"""
