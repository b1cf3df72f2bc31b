"""The tiers with a Docker daemon, `docker` and `gvisor`, and the images for them. Nothing else speaks to a daemon."""
