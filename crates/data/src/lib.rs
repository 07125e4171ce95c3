//! Preference rows in, token ids, order and packs out: formats, chat templates, truncation, plans.
