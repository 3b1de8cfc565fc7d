"""The status page, its plots, and the samples that they show."""
