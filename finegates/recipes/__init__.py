"""Ready-made jobs: the three workflows of the paper, and the data and models they use."""
