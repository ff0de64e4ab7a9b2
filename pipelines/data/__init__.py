"""Raw archives in, batches of fixed shape out: archive -> shards -> order -> stream -> batch."""
