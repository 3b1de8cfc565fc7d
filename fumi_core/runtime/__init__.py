"""What both programs need and neither protocol knows: addresses, settings, logs, the metrics endpoint, starting and stopping."""
