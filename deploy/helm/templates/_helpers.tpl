{{- define "wheels.name" -}}
{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- end }}

{{/* Labels that select the pods of a component. Call: (list $ "gateway") */}}
{{- define "wheels.selector" -}}
app.kubernetes.io/name: training-wheels
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "wheels.labels" -}}
{{ include "wheels.selector" . }}
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
helm.sh/chart: {{ printf "%s-%s" (index . 0).Chart.Name (index . 0).Chart.Version }}
{{- end }}

{{- define "wheels.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default (printf "%s-%s" .Chart.AppVersion (ternary "gpu" "cpu" .Values.gpu)) }}
{{- end }}

{{/* Every replica by its own name, so that the spans of a request go to the one that has its prefix in the cache.
Those that autoscaling has not started are names of nobody, which gateways ask again now and then. */}}
{{- define "wheels.ownUrls" -}}
{{- $name := printf "%s-teacher" (include "wheels.name" .) }}
{{- $scaling := .Values.teacher.autoscaling }}
{{- range until (int (ternary $scaling.maxReplicas .Values.teacher.replicas $scaling.enabled)) }}
- http://{{ $name }}-{{ . }}.{{ $name }}:8000
{{- end }}
{{- end }}

{{/* Whether a teacher runs here: the only one, or one of several that has no address. */}}
{{- define "wheels.runsTeacher" -}}
{{- if .Values.teachers }}
{{- range .Values.teachers }}{{ if not (or .url .tool) }}yes{{ end }}{{ end }}
{{- else if not .Values.teacher.urls }}yes
{{- end }}
{{- end }}

{{/* URLs of what runs elsewhere, teachers and tools. */}}
{{- define "wheels.foreignUrls" -}}
{{- $urls := .Values.teacher.urls }}
{{- range .Values.teachers }}
{{- $given := .url | default .tool }}
{{- if kindIs "string" $given }}{{ $given = list $given }}{{ end }}
{{- $urls = concat $urls ($given | default list) }}
{{- end }}
{{- toYaml $urls }}
{{- end }}

{{/* The Secret with the key of one of several teachers. Call: (list $ "name") */}}
{{- define "wheels.teacherSecret" -}}
{{- $teacher := index (index . 0).Values.teachers (index . 1) }}
{{- if or $teacher.url $teacher.tool }}
{{- toYaml ($teacher.secret | default dict) }}
{{- else }}
{{- toYaml (index . 0).Values.secrets.teacherApiKey }}
{{- end }}
{{- end }}

{{/* The variable with the key of each of several teachers, by name, if it has one. */}}
{{- define "wheels.teacherKeys" -}}
{{- $keys := dict }}
{{- range $number, $name := keys .Values.teachers | sortAlpha }}
{{- if (fromYaml (include "wheels.teacherSecret" (list $ $name))).name }}
{{- $_ := set $keys $name (printf "TEACHER_KEY_%d" $number) }}
{{- end }}
{{- end }}
{{- toYaml $keys }}
{{- end }}

{{/* The gateway's setting `teacher`: addresses, or several teachers by name. */}}
{{- define "wheels.teacher" -}}
{{- if .Values.teachers }}
{{- $named := dict }}
{{- $variables := fromYaml (include "wheels.teacherKeys" .) }}
{{- range $name, $given := .Values.teachers }}
{{- $settings := omit $given "secret" }}
{{- if not (or $given.url $given.tool) }}{{ $_ := set $settings "url" (fromYamlArray (include "wheels.ownUrls" $)) }}{{ end }}
{{- with index $variables $name }}{{ $_ := set $settings "api_key" (printf "$(%s)" .) }}{{ end }}
{{- $_ := set $named $name $settings }}
{{- end }}
{{- toYaml (dict "teacher" $named) }}
{{- else }}
{{- toYaml (dict "teacher" (.Values.teacher.urls | default (fromYamlArray (include "wheels.ownUrls" .)))) }}
{{- end }}
{{- end }}

{{/* Settings of vLLM that follow from the shape of a pod. Call with gateway or teacher. */}}
{{- define "wheels.parallel" -}}
{{- if gt (int .tensorParallel) 1 }}
tensor-parallel-size: {{ int64 .tensorParallel }}
{{- end }}
{{- if gt (int .dataParallel) 1 }}
data-parallel-size: {{ int64 .dataParallel }}
{{- end }}
{{- end }}

{{/* The configuration file of `wheels serve`. What the chart decides comes last. */}}
{{- define "wheels.config" -}}
{{- $config := deepCopy .Values.gateway.config }}
{{- $_ := set $config "student" .Values.gateway.student }}
{{- with .Values.gateway.router }}{{ $_ = set $config "router" . }}{{ end }}
{{- $_ = set $config "drain_seconds" .Values.gateway.drainSeconds }}
{{- if eq "{}" (include "wheels.teacherKeys" .) }}{{ $config = merge (fromYaml (include "wheels.teacher" .)) $config }}{{ end }}
{{- with .Values.secrets.tenants }}{{ if .name }}{{ $_ = set $config "tenants" (printf "/etc/wheels/tenants/%s" .key) }}{{ end }}{{ end }}
{{- with fromYaml (include "wheels.parallel" .Values.gateway) }}{{ $_ = set $config "vllm" (merge . ($config.vllm | default dict)) }}{{ end }}
{{- toYaml $config }}
{{- end }}

{{/* Environment variables of a container, as configured; HOME is writable unless it is set. Call with env. */}}
{{- define "wheels.env" -}}
{{- range $name, $value := merge (deepCopy .) (dict "HOME" "/home/wheels") }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}

{{/* An environment variable from a Secret, where one is named. Call: (list "NAME" $secret) */}}
{{- define "wheels.secretEnv" -}}
{{- $secret := index . 1 }}
{{- if $secret.name }}
- name: {{ index . 0 }}
  valueFrom: {secretKeyRef: {name: {{ $secret.name }}, key: {{ $secret.key }}}}
{{- end }}
{{- end }}

{{/* What gateway and teacher pods have in common. Call: (list $ "gateway" .Values.gateway) */}}
{{- define "wheels.podSpec" -}}
{{- $root := index . 0 }}
{{- $component := index . 1 }}
{{- $values := index . 2 }}
{{- with $root.Values.imagePullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
automountServiceAccountToken: false
# A Service named "wheels" would set WHEELS_PORT, which is a setting of ours.
enableServiceLinks: false
# Time for the pod to leave the Service and to drain, and for the engine to end.
terminationGracePeriodSeconds: {{ add $values.drainSeconds 30 }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile: {type: RuntimeDefault}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{ include "wheels.selector" (list $root $component) | nindent 8 }}
{{- with $values.nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity: {{ toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "wheels.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* requests and limits, with a GPU for every rank. Call: (list $ .Values.gateway) */}}
{{- define "wheels.resources" -}}
{{- $values := index . 1 }}
{{- $resources := deepCopy $values.resources }}
{{- if (index . 0).Values.gpu }}
{{- $gpus := dict "limits" (dict "nvidia.com/gpu" (mul $values.tensorParallel $values.dataParallel)) }}
{{- $resources = merge $gpus $resources }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{/* The three probes: the engine's own health. Not /ready, which is false while the teacher is away: a gateway
without its teacher goes on with the student, and must neither be restarted nor taken out. */}}
{{- define "wheels.probes" -}}
startupProbe:
  httpGet: {path: /health, port: http}
  periodSeconds: 5
  failureThreshold: {{ div .startSeconds 5 }}
readinessProbe:
  httpGet: {path: /health, port: http}
  periodSeconds: 5
  timeoutSeconds: 5
livenessProbe:
  httpGet: {path: /health, port: http}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 6
{{- end }}

{{/* Call: (list $ .Values.gateway) */}}
{{- define "wheels.scratch" -}}
- name: tmp
  emptyDir: {}
- name: home
  emptyDir: {}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ (index . 1).sharedMemory }}}
{{- with (index . 0).Values.models.existingClaim }}
- name: models
  persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
{{- end }}
{{- end }}

{{- define "wheels.scratchMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /home/wheels}
- {name: shm, mountPath: /dev/shm}
{{- if .Values.models.existingClaim }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- end }}

{{/* Whether gateways share limits: by the configuration, or by tenants. */}}
{{- define "wheels.sharesLimits" -}}
{{- if or .Values.gateway.config.limits .Values.secrets.tenants.name }}yes{{ end }}
{{- end }}
