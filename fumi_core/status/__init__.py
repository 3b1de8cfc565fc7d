"""The status page that both programs serve: its plots and tables, and the samples that they show."""
