"""Method `none`: nothing is done here, the checkpoint is passed through as it is."""
