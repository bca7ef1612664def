// Hands news to another component of the page without sending that component's own data again.

export default function ({ data }) {
  window.tracerNews ??= new Map();
  window.tracerNews.set(data.channel, data);
  document.dispatchEvent(new CustomEvent("tracer-news", { detail: data.channel }));
}
