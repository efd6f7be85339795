"""Ready-made jobs: fine-tuning with gates on GLUE-like tasks, and the data and models they use."""
