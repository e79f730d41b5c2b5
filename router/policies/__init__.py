"""Choosing a replica: filter, draw, score, pick.

Filtering by health and room is done as things change (`Pool.open`), so every choice costs the same with ten replicas as
with a thousand. What is drawn are two at random, and whatever a scorer wants looked at; what is picked is the least
score, in seconds. Each scorer is one small file: prefix, affinity, lora, site. A spec joins any of them, with weights:
`prefix + 0.5*site`. Pure: `rng` is given, and nothing keeps a clock.
"""
