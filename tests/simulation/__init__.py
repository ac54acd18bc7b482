"""The real code, step by step, in a simulated world: `world` owns its clock, its disk and its processes."""
