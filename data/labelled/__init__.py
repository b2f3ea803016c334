"""Pictures with a class each: `images` reads them, from what `layouts` knows too, and splits them."""
