"""CorrectNet: neural networks under the device variation of analog in-memory hardware."""
