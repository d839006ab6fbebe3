r"""What the paper's public code of 2021 optimizes, and what it costs."""
