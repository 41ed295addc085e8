"""Every page and plot: of examples, runs, evaluations, studies and generated data."""
