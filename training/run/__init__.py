"""The run around the loop: from the launch to the result, whatever interrupts it."""
