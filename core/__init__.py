"""The words that every other floor uses: requests, jobs, groups, model specs, errors, settings. No heavy import."""

VERSION = "0.1.0"
