"""What does not depend on the device: sharding, the linears that use it, schedules, and the launcher that starts ranks."""
