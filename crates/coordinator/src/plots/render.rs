//! One picture through two back ends: PNG for people, SVG for papers. The font travels with the program, because servers
//! have none.

use std::sync::OnceLock;

use plotters::{
    backend::{BitMapBackend, SVGBackend},
    coord::Shift,
    prelude::{DrawingArea, DrawingBackend, IntoDrawingArea},
    style::{FontStyle, register_font},
};

use super::PlotError;

/// Family by which the drawing code asks for the font; SVG viewers take their own for it.
pub(super) const FONT: &str = "sans-serif";

const BYTES_PER_PIXEL: usize = 3;

/// A picture in both formats.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drawing {
    /// PNG file.
    pub png: Vec<u8>,
    /// SVG document.
    pub svg: String,
}

/// Something that can be drawn on any back end.
pub(super) trait Picture {
    fn draw<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>) -> Result<(), PlotError>;
}

pub(super) fn render(picture: &impl Picture, size: (u32, u32)) -> Result<Drawing, PlotError> {
    load_font()?;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        picture.draw(&area)?;
        area.present().map_err(PlotError::drawing)?;
    }
    let mut pixels = vec![0; size.0 as usize * size.1 as usize * BYTES_PER_PIXEL];
    {
        let area = BitMapBackend::with_buffer(&mut pixels, size).into_drawing_area();
        picture.draw(&area)?;
        area.present().map_err(PlotError::drawing)?;
    }
    let png = encode(&pixels, size).map_err(|error| PlotError(error.to_string()))?;
    Ok(Drawing { png, svg })
}

fn encode(pixels: &[u8], (width, height): (u32, u32)) -> Result<Vec<u8>, png::EncodingError> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(pixels)?;
    writer.finish()?;
    Ok(bytes)
}

fn load_font() -> Result<(), PlotError> {
    static LOADED: OnceLock<bool> = OnceLock::new();
    let font = epaint_default_fonts::UBUNTU_LIGHT;
    let loaded = LOADED.get_or_init(|| register_font(FONT, FontStyle::Normal, font).is_ok());
    if *loaded {
        return Ok(());
    }
    Err(PlotError("the built-in font cannot be read".into()))
}
