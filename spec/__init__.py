"""What RTL and software must agree on: configuration, derived sizes, bit formats, instructions, registers."""
