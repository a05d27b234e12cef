"""Stages: records in, records out. A stage knows engines and judges, and no method."""
