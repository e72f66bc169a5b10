"""Workers of engines that live in environments of their own, with nothing of ours but the benchmark's own words."""
