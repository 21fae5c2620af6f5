"""The schedules of a tensor-parallel decoder beside one another and beside what a simulation says they can reach: make bench-overlap."""
