"""The data: its sources, archives and layout, the rules of the gate, its versions. Without git, DVC, MLflow, torch."""
