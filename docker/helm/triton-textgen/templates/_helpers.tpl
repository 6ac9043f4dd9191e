{{- define "textgen.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "textgen.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "textgen.labels" -}}
{{ include "textgen.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "textgen.security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* The process that asks needs a few seconds beside the answer, so Kubernetes waits longer than the command. */}}
{{- define "textgen.probe" -}}
exec:
  command: [textgen, health, --url, "localhost:8001", --timeout, {{ .timeoutSeconds | quote }}]
periodSeconds: {{ .periodSeconds }}
timeoutSeconds: {{ add .timeoutSeconds 10 }}
failureThreshold: {{ .failureThreshold }}
{{- end }}

{{/* Helm reads numbers as floats: 1000000 must not become 1e+06. */}}
{{- define "textgen.text" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) }}{{ int64 . }}{{ else }}{{ toString . }}{{ end }}
{{- end }}

{{- define "textgen.check" -}}
{{- $own := list "MODEL_ID" "GRACEFUL_TERMINATION_TIMEOUT" "RESTRICTED_API_KEY" "HOST" "HTTP_PORT" "GRPC_PORT" "METRICS_PORT" "GATEWAY_PORT" }}
{{- $unsupported := list "QUANTIZE" "SPECULATE" "KV_CACHE_DTYPE" "ROPE_SCALING" }}
{{- range $name := keys .Values.options | sortAlpha }}
{{- if has $name $own }}{{ fail (printf "options.%s: the chart sets it; see values.yaml" $name) }}{{ end }}
{{- if has $name $unsupported }}{{ fail (printf "options.%s is not supported by this version of the server" $name) }}{{ end }}
{{- end }}
{{- $claim := not (empty .Values.model.pvc.claimName) }}{{ $init := not (empty .Values.model.init.image) }}
{{- if eq $claim $init }}{{ fail "set exactly one of model.pvc.claimName and model.init.image" }}{{ end }}
{{- if not (has .Values.autoscaling.kind (list "" "hpa" "keda")) }}{{ fail "autoscaling.kind must be hpa, keda or empty" }}{{ end }}
{{- end }}
