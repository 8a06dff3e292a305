// The reader: one trace, whole. All text goes in as text, never as markup.

const SIBLINGS = 60;  // samples of the question to jump to; "By question" lists them all
const MATCHES = 5000;  // marked in one trace

/** Return a reader in `box`; `onOpen` is told which other sample to open, `onStep` where to go, `onBack` to close. */
function makeReader(box, { onOpen, onStep, onBack }) {
  let ranges = [];
  let at = 0;
  let place = null;  // the button that says which match is in sight

  function show(trace, { number, of }, expression) {
    const strip = make('div', 'strip');
    const where = make('span', 'where', number ? `${count(number)} of ${count(of)}` : 'not among the filtered');
    place = button('', () => step(1));
    strip.append(
      button('Back', onBack, 'back'), where, place,
      button('↑', () => onStep(-1), 'previous', 'Previous trace'), button('↓', () => onStep(1), 'next', 'Next trace'),
    );
    box.replaceChildren(
      strip, ...verdict(trace), chips(trace), ...samples(trace, onOpen), ...prompt(trace), written(trace),
      details(trace),
    );
    box.scrollTop = 0;
    highlight(expression);
  }

  function highlight(expression) {
    ranges = expression ? matches(box, expression) : [];
    if (CSS.highlights) CSS.highlights.set('match', new Highlight(...ranges));
    place.hidden = !ranges.length;
    at = -1;
    if (ranges.length) step(1);
  }

  /** Bring the next match in sight, or the one before. */
  function step(by) {
    if (!ranges.length) return;
    at = (at + by + ranges.length) % ranges.length;
    const more = ranges.length === MATCHES ? ' or more' : '';
    place.textContent = `match ${count(at + 1)} of ${count(ranges.length)}${more}`;
    const frame = box.getBoundingClientRect();
    const { top, bottom } = ranges[at].getBoundingClientRect();
    if (top < frame.top + 60 || bottom > frame.bottom - 20) box.scrollTop += top - frame.top - frame.height / 3;
  }

  function say(text) {
    ranges = [];
    box.replaceChildren(make('p', 'empty', text));
  }

  return { show, say, step };
}

function button(text, onClick, id = '', label = '') {
  const made = make('button', 'button', text);
  made.type = 'button';
  if (id) made.id = id;
  if (label) {
    made.title = label;
    made.setAttribute('aria-label', label);
  }
  made.addEventListener('click', onClick);
  return made;
}

function verdict(trace) {
  const score = trace.score === undefined ? '' : `, score ${trace.score}`;
  const finding = `${GLYPHS[trace.verdict]} ${word('verdict', trace.verdict)}${score}`;
  const line = make('div', 'verdict', make('span', `said ${trace.verdict}`, finding));
  const pair = (name, value) => make('span', 'pair', `${name} `, make('b', '', value));
  if (trace.predicted !== undefined) line.append(pair('answered', trace.predicted));
  else if (trace.verdict === 'wrong') line.append(make('span', 'pair', 'no answer'));
  if (trace.gold !== undefined) line.append(pair('gold', trace.gold));
  return trace.error === undefined ? [line] : [line, make('p', 'error', trace.error)];
}

function chips(trace) {
  const list = make('ul', 'chips');
  const decided = [word('status', trace.status), trace.reasons.join(', ')].filter(Boolean).join(': ');
  if (decided) list.append(make('li', trace.status, decided));
  for (const fact of [plural(trace.tokens, 'token'), `ended by ${word('finish', trace.finish)}`, ...trace.flags]) {
    list.append(make('li', '', fact));
  }
  return list;
}

function samples(trace, onOpen) {
  const all = trace.question.traces;
  if (all.length < 2) return [];
  const row = make('div', 'samples', `${count(trace.question.right)} of ${count(all.length)} samples right`);
  for (const other of all.slice(0, SIBLINGS)) {
    const made = button('', () => onOpen(other));
    made.className = '';
    made.append(glyph(other.verdict), String(other.sample));
    made.setAttribute('aria-label', `Sample ${other.sample}, ${word('verdict', other.verdict)}`);
    if (other === trace) made.setAttribute('aria-current', 'true');
    row.append(made);
  }
  if (all.length > SIBLINGS) row.append(`and ${count(all.length - SIBLINGS)} more`);
  return [row];
}

function prompt(trace) {
  return trace.question.messages.map(([role, content]) => {
    const text = make('p', 'text', content);
    text.dir = 'auto';
    const title = make('h2', '', role === 'user' ? 'question' : role);
    return make('section', role === 'system' ? 'turn system' : 'turn', title, text);
  });
}

function written(trace) {
  const frame = make('section', 'written');
  for (const [name, text] of [['thought', trace.thought], ['', trace.text]]) {
    if (!text.trim() && (name || trace.thought)) continue;
    const block = make('pre', name, name ? text.trimEnd() : text.trim());
    block.dir = 'auto';
    frame.append(block);
  }
  return make('section', 'turn', make('h2', '', 'completion'), frame);
}

function details(trace) {
  const { question } = trace;
  const known = {
    ...question.meta, verifier: trace.verifier, 'what it says': trace.why, source: question.source,
    sample: trace.sample, seed: trace.seed, uid: trace.uid, 'uid of the question': question.uid,
  };
  const list = make('dl', 'facts');
  for (const [name, value] of Object.entries(known)) {
    if (value !== undefined) list.append(make('dt', '', name), make('dd', '', String(value)));
  }
  return list;
}

/** Return the places of an expression in the question and the completion that are shown. */
function matches(box, expression) {
  const found = [];
  for (const block of box.querySelectorAll('.turn:not(.system) .text, .written pre')) {
    for (const match of block.textContent.matchAll(expression)) {
      const range = new Range();
      range.setStart(block.firstChild, match.index);
      range.setEnd(block.firstChild, match.index + match[0].length);
      found.push(range);
      if (found.length === MATCHES) return found;
    }
  }
  return found;
}
