"""What vit_fast and its peers cost, side by side: each file a script, started as `python -m benchmarks.NAME`."""
