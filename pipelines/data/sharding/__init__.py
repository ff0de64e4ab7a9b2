"""From a recognised archive to WebDataset shards, an index and a manifest."""
