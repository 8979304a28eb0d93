"""A LeRobotDataset in, training batches out: frame store, samples, normalisation, augmentation."""
