"""What else a plan moves beside refusal: truthfulness, sycophancy, bias, persona, calibration, opinions."""
