"""Whether each part of distillation earns its place: `python -m benchmarks.ablation`."""
