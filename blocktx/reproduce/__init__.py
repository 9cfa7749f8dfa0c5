"""The paper's findings, each as a study: its runs, what they measured, and whether it agrees."""
