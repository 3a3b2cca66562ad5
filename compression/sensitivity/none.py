"""Method `none`: no block is scored; the table has outlier ratios only."""
