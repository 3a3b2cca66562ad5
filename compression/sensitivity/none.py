"""Method `none`: nothing is scored; the table has outlier ratios only."""
