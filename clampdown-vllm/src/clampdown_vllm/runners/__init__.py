"""The methods of vLLM's two model runners that say whose the tokens of a pass are. They share nothing."""
