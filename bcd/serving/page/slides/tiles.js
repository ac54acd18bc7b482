// The tiles of a slide: unpacked, drawn as one map on one canvas, and found by place.

const TYPES = { int32: Int32Array, uint32: Uint32Array, float32: Float32Array, float64: Float64Array, uint8: Uint8Array };
const NOTHING = 255;
// Pixels of the screen: tiles of this size have an edge; and the map is drawn from a bitmap while they are smaller.
const EDGED_PX = 12;
const MOST_BITMAP_PX = 4096;
// Stripes over tiles unlike the training data: their distance, and how much of it they cover.
const [HATCH_PX, STRIPE_PX] = [8, 2.6];

/** Columns of typed arrays from the server's answer (bcd/serving/viewer/packed.py). */
export function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const columns = {};
  for (const [name, { type, offset, length: count }] of Object.entries(header.columns)) {
    columns[name] = new TYPES[type](buffer, 4 + length + offset, count);
  }
  return { ...header, ...columns };
}

export class TileMap {
  /** Tiles of `unpack`; scale and colours are those of the heat map, the threshold is that of the model. */
  constructor(tiles, { colors, edge, hatch }, threshold) {
    Object.assign(this, { tiles, colors, hatch });
    this.edges = colors.map((color) => darker(color, edge));
    this.shades = Uint16Array.from(tiles.probability, (p) => (Number.isNaN(p) ? colors.length : shade(p, threshold, colors.length)));
    this.order = byShade(this.shades, colors.length);
    this.bitmap = null;
  }

  get size() {
    return this.tiles.tiles;
  }

  /** The tile that covers a place in level-0 pixels, -1 for none; of several, the one whose middle is nearest. */
  at(x, y) {
    const { x: lefts, y: tops, width, height } = this.tiles;
    let [best, distance] = [-1, Infinity];
    for (let i = 0; i < lefts.length; i++) {
      const [right, down] = [x - lefts[i], y - tops[i]];
      if (right < 0 || down < 0 || right >= width || down >= height) continue;
      const far = (right - width / 2) ** 2 + (down - height / 2) ** 2;
      if (far < distance) [best, distance] = [i, far];
    }
    return best;
  }

  /** All facts of a tile. */
  row(i) {
    const { tiles } = this;
    const rest = tiles.ids.subarray(i ? tiles.id_ends[i - 1] : 0, tiles.id_ends[i]);
    const named = (list, code) => (code === NOTHING ? null : list[code]);
    return {
      id: tiles.id_prefix + new TextDecoder().decode(rest),
      x: tiles.x[i],
      y: tiles.y[i],
      probability: tiles.probability[i],
      log_odds: tiles.log_odds[i],
      novelty: tiles.novelty[i],
      warned: Boolean(tiles.warned[i]),
      predicted: named(tiles.classes, tiles.predicted[i]),
      error: named(tiles.errors, tiles.error[i]),
    };
  }

  /** Draw what is in view: `left` and `top` in level-0 pixels, `scale` in pixels of the canvas per level-0 pixel. */
  draw(context, view) {
    const { width, height } = context.canvas;
    context.clearRect(0, 0, width, height);
    if (!this.size) return;
    this.bitmap ??= this.drawn();
    const { canvas, left, top, scale } = this.bitmap;
    if (view.scale <= scale) {
      const factor = view.scale / scale;
      const place = [(left - view.left) * view.scale, (top - view.top) * view.scale];
      context.imageSmoothingQuality = "medium";
      context.drawImage(canvas, ...place, canvas.width * factor, canvas.height * factor);
      return;
    }
    this.paint(context, view);
  }

  /** The whole map, small enough that what is beyond it has few tiles in view. */
  drawn() {
    const { x, y, width, height } = this.tiles;
    const [left, top] = [least(x), least(y)];
    const [across, down] = [most(x) + width - left, most(y) + height - top];
    const scale = Math.min(MOST_BITMAP_PX / Math.max(across, down), EDGED_PX / Math.max(1, Math.min(width, height)));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.ceil(across * scale));
    canvas.height = Math.max(1, Math.ceil(down * scale));
    this.paint(canvas.getContext("2d"), { left, top, scale });
    return { canvas, left, top, scale };
  }

  paint(context, { left, top, scale }) {
    const { x, y, width, height, warned } = this.tiles;
    const [right, bottom] = [left + context.canvas.width / scale, top + context.canvas.height / scale];
    const edged = Math.min(width, height) * scale >= EDGED_PX;
    const hatched = [];
    let shade = -1;
    for (const i of this.order) {
      if (x[i] >= right || y[i] >= bottom || x[i] + width <= left || y[i] + height <= top) continue;
      if (this.shades[i] !== shade) shade = this.shades[i];
      // Whole pixels, so that neighbours touch and do not overlap.
      const [from, to] = [Math.round((x[i] - left) * scale), Math.round((x[i] + width - left) * scale)];
      const [up, low] = [Math.round((y[i] - top) * scale), Math.round((y[i] + height - top) * scale)];
      const [w, h] = [Math.max(1, to - from), Math.max(1, low - up)];
      if (edged) {
        context.fillStyle = this.edges[shade];
        context.fillRect(from, up, w, h);
        context.fillStyle = this.colors[shade];
        context.fillRect(from + 1, up + 1, w - 2, h - 2);
      } else {
        context.fillStyle = this.colors[shade];
        context.fillRect(from, up, w, h);
      }
      if (warned[i]) hatched.push(from, up, w, h);
    }
    if (!hatched.length) return;
    context.fillStyle = context.createPattern(stripes(this.hatch), "repeat");
    for (let i = 0; i < hatched.length; i += 4) context.fillRect(...hatched.slice(i, i + 4));
  }
}

/** The place of a probability on the scale, with the threshold in its middle, as in bcd/reports/heatmap.py. */
export function shade(p, threshold, n) {
  const place = p < threshold ? p / threshold / 2 : (1 + (p - threshold) / (1 - threshold || 1)) / 2;
  return Math.min(n - 1, Math.trunc(place * n));
}

/** Tiles with a colour, those of one colour together. */
function byShade(shades, n) {
  const starts = new Uint32Array(n + 2);
  for (const one of shades) starts[one + 1]++;
  for (let i = 1; i < starts.length; i++) starts[i] += starts[i - 1];
  const order = new Uint32Array(starts[n]);
  shades.forEach((one, i) => one < n && (order[starts[one]++] = i));
  return order;
}

const least = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);
const most = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);

function darker(color, factor) {
  return `rgb(${[1, 3, 5].map((at) => Math.round(factor * parseInt(color.slice(at, at + 2), 16))).join(" ")})`;
}

function stripes(shadow) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = HATCH_PX;
  const context = canvas.getContext("2d");
  context.strokeStyle = `rgb(0 0 0 / ${1 - shadow})`;
  context.lineWidth = STRIPE_PX;
  context.beginPath();
  // The diagonal, and the corners that its neighbours cut off.
  for (const shift of [-HATCH_PX, 0, HATCH_PX]) {
    context.moveTo(shift - 1, HATCH_PX + 1);
    context.lineTo(shift + HATCH_PX + 1, -1);
  }
  context.stroke();
  return canvas;
}
