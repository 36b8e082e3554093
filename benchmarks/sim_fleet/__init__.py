"""Parts of bench_sim_fleet: the fleet, its parameters as measured, the load, and the simulator's answer."""
