"""What both programs share and neither protocol knows: addresses, settings, logs, the metrics server, starting and stopping."""
