"""clampdown's plans inside stock vLLM, as a plugin: nothing of vLLM is replaced on disk.

front/     where requests come in: names to plans, prompts to intervals, gates to verdicts, receipts to replies
blocks.py  in the engine's core: the prefix cache's key says what is done to a block's own tokens
worker/    beside the model: buffers of fixed address, seats of requests, the op at the sites, what was counted
runners/   the few methods of vLLM's model runners that say whose the tokens of a pass are
plugin.py  puts all of it in place, in every process
"""

PLUGIN_VERSION = "0.1.0"
