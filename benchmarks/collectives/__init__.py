"""The parts of benchmarks/collectives.py: bars.py is pure; one_host, openmpi, stress, emulated, payload and accuracy start ranks and
measure; report and plots print. Every part gives a frozen dataclass of plain numbers that knows its verdicts."""
