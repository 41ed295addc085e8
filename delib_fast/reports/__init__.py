"""HTML pages and plots of examples, runs, evaluations, studies and generated data."""
