"""The processes of a run and what they exchange.

config.py        the section `parallel` of a config
device.py        the device of this process
world.py         the process group: how ranks meet, their mesh, errors when one is lost
collectives.py   sums, gathers and broadcasts over ranks
watch.py         a thread that ends the run when a rank hangs, and names the rank
"""
