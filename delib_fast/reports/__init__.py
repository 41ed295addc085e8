"""Every page and plot: of runs, evaluations, studies and generated data."""
