"""The parts of benchmarks/cpu_attention.py: shapes and verdicts are pure, limits and peers touch the machine, report and plots print."""
