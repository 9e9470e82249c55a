// Swagger UI over our own openapi.json; it sends the CSRF cookie along, so that "Try it out" works when signed in.
const root = document.getElementById("swagger-ui");
const csrf = () => (document.cookie.match(/(?:^|; )csrf_access_token=([^;]*)/) || [])[1];
window.ui = SwaggerUIBundle({
  url: root.dataset.url,
  domNode: root,
  requestInterceptor: (request) => {
    if (csrf()) request.headers["X-CSRF-TOKEN"] = csrf();
    return request;
  },
});
