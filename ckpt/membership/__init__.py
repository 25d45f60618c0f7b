"""Who is in a job, who leads, and which epoch holds. See docs/design/015-membership.md."""
