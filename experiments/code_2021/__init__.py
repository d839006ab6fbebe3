r"""What the paper's public code of 2021 optimises, and what it costs."""
