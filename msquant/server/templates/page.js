'use strict';
const box = document.getElementById('box');
const [turns, question, state, send, stop] =
  ['turns', 'question', 'state', 'send', 'stop'].map(id => document.getElementById(id));
const chats = box.dataset.chats === 'yes';
let messages = [];
let running = null;

// Behind a proxy the server does not know by what address the browser has come.
for (const code of document.querySelectorAll('.address')) {
  code.textContent = code.textContent.replaceAll(box.dataset.address, location.origin);
}

function turn(role, text) {
  const shown = document.createElement('div');
  shown.className = 'turn ' + role;
  shown.textContent = text;
  turns.append(shown);
  return shown;
}

function say(text, bad) {
  state.textContent = text;
  state.classList.toggle('bad', Boolean(bad));
}

async function* events(body) {
  let rest = '';
  for (const reader = body.pipeThrough(new TextDecoderStream()).getReader(); ;) {
    const {done, value} = await reader.read();
    if (done) return;
    const parts = (rest + value).split('\n\n');
    rest = parts.pop();
    for (const part of parts) {
      if (part === 'data: [DONE]') return;
      const event = JSON.parse(part.slice('data: '.length));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function ask(text, shown) {
  const headers = {'Content-Type': 'application/json'};
  const key = document.getElementById('key');
  if (key) headers.Authorization = 'Bearer ' + key.value;
  const asked = chats ? {messages: [...messages, {role: 'user', content: text}]} : {prompt: text};
  const began = performance.now();
  const response = await fetch(chats ? '/v1/chat/completions' : '/v1/completions', {
    method: 'POST', headers, signal: running.signal, body: JSON.stringify({
      model: box.dataset.model, ...asked, stream: true, stream_options: {include_usage: true},
      temperature: document.getElementById('temperature').valueAsNumber,
      max_tokens: document.getElementById('tokens').valueAsNumber,
    }),
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  for await (const event of events(response.body)) {
    for (const choice of event.choices) {
      shown.textContent += (chats ? choice.delta.content : choice.text) || '';
    }
    if (event.usage) {
      const seconds = (performance.now() - began) / 1000;
      say(`${event.usage.completion_tokens} tokens in ${seconds.toFixed(1)} s`);
    }
  }
}

box.addEventListener('submit', async event => {
  event.preventDefault();
  if (running) return;
  const text = question.value;
  running = new AbortController();
  send.disabled = true;
  stop.hidden = false;
  say('answering …');
  const asked = turn('user', text);
  const shown = turn('assistant', '');
  if (chats) question.value = '';
  try {
    await ask(text, shown);
  } catch (error) {
    say(error.name === 'AbortError' ? 'stopped' : error.message, error.name !== 'AbortError');
  }
  if (!shown.isConnected) {
    say('');
  } else if (shown.textContent) {
    messages.push({role: 'user', content: text}, {role: 'assistant', content: shown.textContent});
  } else {
    asked.remove();
    shown.remove();
    question.value = text;
  }
  running = null;
  send.disabled = false;
  stop.hidden = true;
  question.focus();
});

question.addEventListener('keydown', event => {
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) box.requestSubmit();
});
stop.addEventListener('click', () => running && running.abort());
document.getElementById('clear').addEventListener('click', () => {
  if (running) running.abort();
  messages = [];
  turns.replaceChildren();
  say('');
});
