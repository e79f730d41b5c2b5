"""HTTP as the edge serves it: which app answers, and what a refusal looks like."""
